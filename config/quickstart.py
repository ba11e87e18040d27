# A model of half a million parameters that learns to tell synthetic stories in
# some minutes on two cores: what make quickstart trains.
data_dir = "data/synthetic"
vocab_size = 1024

dim = 128
n_layers = 4
n_heads = 4
max_seq_len = 256

batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 4e-3
max_iters = 600
warmup_iters = 40
eval_interval = 100
eval_iters = 20
log_interval = 10
sample_interval = 200
