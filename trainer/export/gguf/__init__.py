"""Exports a merged model as a GGUF file for llama.cpp, with a Modelfile for Ollama."""
