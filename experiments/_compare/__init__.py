"""The steps of `compare`: reading the data, fitting the losses, wording and drawing the result."""
