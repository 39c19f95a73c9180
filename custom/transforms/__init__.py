"""MONAI map transforms: from a case's files to tensors, and from a prediction to files."""
