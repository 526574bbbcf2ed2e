"""What the stages do not need: nothing outside this folder imports it."""
