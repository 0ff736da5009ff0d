"""The HTTP server: OpenAI's API, a chat page and metrics over the asynchronous engine."""
