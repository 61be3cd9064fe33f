"""What makes an accumulated gradient another one than the large batch's."""
