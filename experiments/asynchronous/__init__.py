"""Asynchronous distributed bilevel optimization: ADBO and its neighbours against time, under delays and stragglers."""
