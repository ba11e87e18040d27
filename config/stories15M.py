# llama2.c's stories15M: 15M parameters with Llama 2's vocabulary, 7M with 4096 tokens.
dim = 288
n_layers = 6
n_heads = 6
n_kv_heads = 6
max_seq_len = 256

# 131,072 tokens per step
batch_size = 32
gradient_accumulation_steps = 16
learning_rate = 5e-4
max_iters = 100_000
warmup_iters = 1000
