"""Networks: no Gy, no files, no configuration."""
