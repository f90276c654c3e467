"""The HTTP side: OpenAI's vision-chat API on top of a `VLPipeline`."""
