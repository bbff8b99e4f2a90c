"""The local studio over HTTP: who may come in, what bodies are read, which routes there are."""
