"""The clinical protocol at work: as a training loss, as a validation metric, and as guidance while sampling."""
