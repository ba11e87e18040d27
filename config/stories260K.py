# llama2.c's stories260K: 260 thousand parameters with grouped-query attention. It fits into a
# microcontroller. Its vocabulary: python tinystories.py pretokenize --vocab_size=512
vocab_size = 512

dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
multiple_of = 4
max_seq_len = 512
dropout = 0.05

# 65,536 tokens per step
batch_size = 128
gradient_accumulation_steps = 1
learning_rate = 1e-3
max_iters = 100_000
warmup_iters = 1000
