# python tinystories.py pretokenize config/quickstart_data.py
# The synthetic stories, with a vocabulary of a size that fits their six hundred words.
input = "data/synthetic"
data_dir = "data/synthetic"
vocab_size = 1024
