"""`molora route`: an OpenAI proxy that chooses the adapter and asks another server."""
