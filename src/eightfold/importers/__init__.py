"""Float models in other containers -> model directories."""
