"""The decoder in torch: slow, plain, and right. It calibrates, and it judges every faster implementation."""
