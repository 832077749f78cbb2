"""From words to tensors: token ids, word vectors, text files."""
