"""The figures of all experiments, and a page that shows them with the commands that make them."""
