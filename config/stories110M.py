# llama2.c's stories110M: 110 million parameters with Llama 2's vocabulary.
dim = 768
n_layers = 12
n_heads = 12
n_kv_heads = 12
max_seq_len = 1024
dropout = 0.1

# 131,072 tokens per step
batch_size = 8
gradient_accumulation_steps = 16
learning_rate = 5e-4
max_iters = 200_000
warmup_iters = 2000
