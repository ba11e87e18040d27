# make quickstart: one million parameters learn to write synthetic stories, in minutes on two cores.
# Small batches and many steps: after about 2,000 steps, heroes keep their names.
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
