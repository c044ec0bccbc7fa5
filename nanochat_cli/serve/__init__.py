"""`nanochat serve`: a model over HTTP, with OpenAI's endpoints for text, llama.cpp's for editors, and a page to try it.

Needs the extra [serve]; every module but `run` imports it. One thread computes (`engine`), one event loop answers.
"""
