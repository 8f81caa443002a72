"""ComfyUI's single files."""
