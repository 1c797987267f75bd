"""A run behind the HTTP interface of OpenAI, for one machine."""
