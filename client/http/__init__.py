"""The HTTP door of a client: an API that programs written for OpenAI's speak to."""
