"""GGUF files: blocks of codes, and the type that llama.cpp gives each tensor."""
