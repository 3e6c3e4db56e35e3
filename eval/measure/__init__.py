"""What is measured or counted of one model: accuracy, FLOPs, and how sure a number is."""
