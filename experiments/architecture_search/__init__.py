"""Architecture search: z the weights of a convolution network, x the architecture of its cells (DARTS)."""
