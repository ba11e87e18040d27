# llama2.c's stories42M: 42 million parameters with Llama 2's vocabulary.
dim = 512
n_layers = 8
n_heads = 8
n_kv_heads = 8
max_seq_len = 1024
dropout = 0.1

# 131,072 tokens per step
batch_size = 16
gradient_accumulation_steps = 8
learning_rate = 5e-4
max_iters = 100_000
warmup_iters = 1000
