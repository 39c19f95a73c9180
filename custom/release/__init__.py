"""From the repository to a Model Zoo release: assembled, verified, and run from its zip. Not part of the release."""
