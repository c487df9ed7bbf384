// Where an answer looked, drawn over the picture: what `cmg.heat` of a reply says.
const STOPS = [[76, 5, 136], [119, 18, 141], [162, 35, 133], [202, 54, 117], [236, 81, 93], [254, 121, 72], [254, 167, 91], [254, 205, 121], [254, 241, 159]];
const COVER = 0.8;
const GREY = 0.75;
export const SCALES = {
  relative: { low: 1, high: 8, ticks: [1, 2, 4, 8], meaning: "1x = what the place gets from the answer's tokens on average" },
  absolute: { low: 0.25, high: 16, ticks: [0.25, 1, 4, 16], meaning: "1x = what the place would get if all attention were spread evenly over the picture" },
};

export class Heat {
  constructor({ layers, masked, shape, images, weights }) {
    Object.assign(this, { layers, masked, shape, images });
    const data = new DataView(Uint8Array.from(atob(weights), (c) => c.charCodeAt(0)).buffer);
    this.weights = Float32Array.from({ length: data.byteLength / 2 }, (_, i) => half(data.getUint16(2 * i, true)));
  }

  // What each image token gets: the mean over tokens, and over layers ("mean", "masked" or one).
  of(tokens, layer) {
    const [, nLayers, n] = this.shape;
    const chosen = layer === "mean" ? this.layers : layer === "masked" ? this.masked : [Number(layer)];
    const found = new Float64Array(n);
    for (const t of tokens) {
      for (const l of chosen) {
        const row = (t * nLayers + this.layers.indexOf(l)) * n;
        for (let i = 0; i < n; i += 1) found[i] += this.weights[row + i];
      }
    }
    return found.map((sum) => sum / tokens.length / chosen.length);
  }

  // Attention a pixel of a picture, on a grid of width x height; views that overlap add up.
  spread(all, width, height, k) {
    const { size, boxes } = this.images[k];
    const first = this.images.slice(0, k).reduce((n, image) => n + image.n_tokens, 0);
    const values = all.subarray(first, first + this.images[k].n_tokens);
    const found = new Float64Array(width * height);
    boxes.forEach((box, i) => {
      if (!box) return;
      const [left, top, right, bottom] = box.map((x, k) => (x * [width, height][k % 2]) / size[k % 2]);
      const density = values[i] / ((right - left) * (bottom - top));
      for (let y = Math.round(top); y < Math.round(bottom); y += 1) {
        for (let x = Math.round(left); x < Math.round(right); x += 1) found[y * width + x] += density;
      }
    });
    return found;
  }

  // The values of picture k on that grid, in the scale's unit: an even spread is over all pictures.
  map(tokens, layer, scale, width, height, k = 0) {
    const found = this.spread(this.of(tokens, layer), width, height, k);
    const share = this.images[k].n_tokens / this.shape[2];
    if (scale === "absolute") return found.map((value) => (value * width * height) / share);
    const all = Array.from({ length: this.shape[0] }, (_, i) => i);
    const usual = this.spread(this.of(all, layer), width, height, k);
    return found.map((value, i) => (value === 0 && usual[i] === 0 ? 0 : value / usual[i]));
  }
}

export function draw(canvas, picture, values, scale) {
  const { low, high } = SCALES[scale];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  values.forEach((value, i) => {
    const share = Math.min(1, Math.max(0, Math.log(value / low) / Math.log(high / low))) || 0;
    const pixel = image.data.subarray(4 * i, 4 * i + 3);
    const grey = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2];
    const cover = COVER * share ** 0.7;
    colour(share).forEach((hot, k) => {
      pixel[k] = (1 - cover) * (GREY * grey + (1 - GREY) * pixel[k]) + cover * hot;
    });
  });
  context.putImageData(image, 0, 0);
}

export function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x += 1) {
    context.fillStyle = `rgb(${colour(x / (canvas.width - 1)).map(Math.round).join(",")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

function colour(share) {
  const place = share * (STOPS.length - 1);
  const first = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[first].map((from, k) => from + (place - first) * (STOPS[first + 1][k] - from));
}

// A float16 by its bits.
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}
