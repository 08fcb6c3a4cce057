"""The command line: one file per verb. Heavy packages are imported when a verb needs them."""
