"""Gates that learn from recorded outcomes which agents answer a question best: noisy top-k, and nearest neighbours."""
