"""LoRAs: which ones a job wants, what their files hold and mean, how they come and go without a trace."""
