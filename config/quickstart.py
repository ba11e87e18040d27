# A model of three quarters of a million parameters that learns to tell synthetic stories in
# some minutes on two cores: what make quickstart trains. Small batches, for many steps: after
# about 2,500 of them it has understood that a hero keeps the same name.
data_dir = "data/synthetic"
vocab_size = 1024

dim = 128
n_layers = 3
n_heads = 4
max_seq_len = 256

batch_size = 4
gradient_accumulation_steps = 1
learning_rate = 5e-3
max_iters = 4500
warmup_iters = 100
eval_interval = 500
eval_iters = 50
log_interval = 50
sample_interval = 1500
checkpoint_interval = 500
