# 讓圖表能顯示中文：安裝一個含有繁體中文字型（Noto Sans TC）的套件，並指定給 matplotlib。
from pathlib import Path

if find_spec("pylopdf_fonts_zh_tw") is None:
    subprocess.run([*pip, "--no-deps", "pylopdf-fonts-zh-tw==0.1.1"], check=True)

import matplotlib.pyplot as plt
from matplotlib import font_manager

fonts = Path(find_spec("pylopdf_fonts_zh_tw").origin).parent
font_manager.fontManager.addfont(fonts / "NotoSansTC-Regular.otf")
plt.rcParams["font.family"] = ["Noto Sans TC", "DejaVu Sans"]
