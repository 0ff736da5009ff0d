"""Models of Hugging Face and ModelScope: fetched by their ids, and published."""
