# python tinystories.py pretokenize config/quickstart_data.py
# The synthetic stories, in a vocabulary that suits their six hundred words.
input = "data/synthetic"
data_dir = "data/synthetic"
vocab_size = 1024
