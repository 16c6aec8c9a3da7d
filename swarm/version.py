"""The version of this software, as the wheel, the announcement and the command line state it."""

VERSION = "0.1.0"
