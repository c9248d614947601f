"""What is seen of a run: figures by layer, TensorBoard, pictures, alarms."""
