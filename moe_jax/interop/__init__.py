"""Other worlds: weights of the original system, faiss. Each import is lazy."""
