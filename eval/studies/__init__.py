"""What is compared with what: plans of trials, and what their results say."""
