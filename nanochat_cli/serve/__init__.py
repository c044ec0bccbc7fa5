"""`nanochat serve`: a model over HTTP, with OpenAI's endpoints for text and llama.cpp's for editors.

Needs the extra [serve]; every module but `run` imports it. One thread computes (`engine`), one event loop answers.
"""
