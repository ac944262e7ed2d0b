"""From logits to text: the parts that sample.py is assembled from."""
