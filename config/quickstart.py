# A model of one million parameters that learns to tell synthetic stories in some minutes on two
# cores: what make quickstart trains. Small batches, for many steps: only after some 2,000 of them
# does it understand that a hero keeps the same name.
data_dir = "data/synthetic"
vocab_size = 1024

dim = 128
n_layers = 4
n_heads = 4
max_seq_len = 256

batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 6e-3
max_iters = 3000
warmup_iters = 100
eval_interval = 500
eval_iters = 25
log_interval = 50
sample_interval = 1000
checkpoint_interval = 500
