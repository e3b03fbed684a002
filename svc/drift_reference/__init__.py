"""What a version keeps of its training data for drift to be measured against."""
