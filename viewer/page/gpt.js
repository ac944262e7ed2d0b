// A GPT in the page: model.py in JavaScript, in its order and with its names.
//
// Arrays are flat and float32. A suffix names their dimensions as in model.py: x_TC[t * C + c].
//
// A record holds what every layer computed at every position so far. It is the cache of keys and
// values and the exhibit in one: a pass reads what came before from it, and appends what is new.

class Record {
  constructor(config, capacity) {
    const { n_layer, n_head: H, n_kv_head: K, head_dim: D, n_embd: C, vocab_size: V } = config;
    const array = (width) => new Float32Array(capacity * width);
    Object.assign(this, { capacity, tokens: [] });
    this.streams = Array.from({ length: 2 * n_layer + 1 }, () => array(C)); // embedded, attn 0, mlp 0, …
    this.layers = Array.from({ length: n_layer }, () => ({
      q: array(H * D), k: array(K * D), v: array(K * D), y: array(H * D), // y: outputs of the heads
      weights: Array.from({ length: H }, () => array((capacity + 1) / 2)), // row t has t + 1 of them
    }));
    this.logits = array(V);
  }

  // Positions start … start + T - 1 of an array
  rows(array, start, T) {
    const width = array.length / this.capacity;
    return array.subarray(start * width, (start + T) * width);
  }
}

class GPT {
  // `weights` has an array for each name of model.py's state_dict
  constructor(config, weights) {
    const head = weights["lm_head.weight"] ?? weights["wte.weight"]; // tied (Press & Wolf, 2017)
    Object.assign(this, { config, weights: { ...weights, "lm_head.weight": head } });
    this.isModern = config.architecture === "modern";
    this.eps = this.isModern ? 1e-6 : 1e-5;
    const R = config.head_dim / 2;
    this.turns_R = Float32Array.from({ length: R }, (_, r) => config.rope_theta ** -Math.fround(r / R));
  }

  // Append tokens to a record. Heads whose "layer.head" is in `off` pass on nothing.
  // With `from`, what the record holds below that layer is taken as it is.
  read(tokens, record, off = new Set(), from = 0) {
    const { n_layer, vocab_size: V } = this.config, start = record.tokens.length, T = tokens.length;
    record.tokens.push(...tokens);
    if (from === 0) this.embed(tokens, start, record);
    for (let layer = from; layer < n_layer; layer++) this.block(layer, start, T, record, off);
    const x_TC = this.norm("ln_f", record.rows(record.streams[2 * n_layer], start, T));
    record.logits.set(this.linear("lm_head", x_TC, T), start * V);
  }

  embed(tokens, start, record) {
    const { n_embd: C } = this.config, wte = this.weights["wte.weight"], wpe = this.weights["wpe.weight"];
    tokens.forEach((token, t) => {
      for (let c = 0; c < C; c++) {
        const position = wpe ? wpe[(start + t) * C + c] : 0; // a modern model rotates q and k instead
        record.streams[0][(start + t) * C + c] = wte[token * C + c] + position;
      }
    });
  }

  // Attention mixes positions, then the MLP mixes channels; each adds to the stream
  block(layer, start, T, record, off) {
    const name = `blocks.${layer}`, at = (n) => record.rows(record.streams[2 * layer + n], start, T);
    add(at(0), this.attend(layer, this.norm(`${name}.ln_1`, at(0)), start, T, record, off), at(1));
    add(at(1), this.mlp(layer, this.norm(`${name}.ln_2`, at(1)), T), at(2));
  }

  attend(layer, x_TC, start, T, record, off) {
    const { n_head: H, n_kv_head: K, head_dim: D } = this.config, kept = record.layers[layer];
    const name = `blocks.${layer}.attn`, heads_TND = this.linear(`${name}.c_attn`, x_TC, T);
    for (let t = 0; t < T; t++) {
      const heads = heads_TND.subarray(t * (H + 2 * K) * D, (t + 1) * (H + 2 * K) * D), position = start + t;
      kept.q.set(this.turned(`${name}.q_norm`, heads.subarray(0, H * D), position), position * H * D);
      kept.k.set(this.turned(`${name}.k_norm`, heads.subarray(H * D, (H + K) * D), position), position * K * D);
      kept.v.set(heads.subarray((H + K) * D), position * K * D);
    }
    for (let h = 0; h < H; h++)
      for (let t = start; t < start + T; t++) this.attention(kept, h, t, off.has(`${layer}.${h}`));
    return this.linear(`${name}.c_proj`, record.rows(kept.y, start, T), T);
  }

  // A modern model normalises queries and keys, and turns each pair of channels by its angle
  turned(name, heads_D, position) {
    if (!this.isModern) return heads_D;
    const { head_dim: D } = this.config, R = D / 2, x_D = this.norm(name, heads_D, D);
    for (let r = 0; r < R; r++) {
      const angle = Math.fround(position * this.turns_R[r]), cos = Math.cos(angle), sin = Math.sin(angle);
      for (let i = r; i < x_D.length; i += D) {
        const a = x_D[i], b = x_D[i + R];
        x_D[i] = a * cos - b * sin;
        x_D[i + R] = b * cos + a * sin;
      }
    }
    return x_D;
  }

  // softmax(q·k/√d) v for one head and one query t, which sees the keys s ≤ t
  attention({ q, k, v, y, weights }, h, t, isOff) {
    const { n_head: H, n_kv_head: K, head_dim: D } = this.config, shared = Math.floor((h * K) / H);
    const a = weights[h].subarray((t * (t + 1)) / 2, (t * (t + 1)) / 2 + t + 1), root = Math.sqrt(D);
    const y_D = y.subarray((t * H + h) * D, (t * H + h + 1) * D).fill(0);
    let most = -Infinity, total = 0;
    for (let s = 0; s <= t; s++) {
      let product = 0;
      for (let d = 0; d < D; d++) product += q[(t * H + h) * D + d] * k[(s * K + shared) * D + d];
      a[s] = product / root;
      most = Math.max(most, a[s]);
    }
    for (let s = 0; s <= t; s++) total += a[s] = Math.exp(a[s] - most); // the largest would overflow
    for (let s = 0; s <= t; s++) {
      a[s] /= total;
      if (!isOff) for (let d = 0; d < D; d++) y_D[d] += a[s] * v[(s * K + shared) * D + d];
    }
  }

  // W₂ gelu(W₁ x), or SwiGLU, W₂ (silu(W x) ⊙ W₁ x)
  mlp(layer, x_TC, T) {
    const name = `blocks.${layer}.mlp`, inner = this.linear(`${name}.c_fc`, x_TC, T);
    const gate = this.isModern ? this.linear(`${name}.c_gate`, x_TC, T) : null;
    for (let i = 0; i < inner.length; i++) inner[i] = gate ? inner[i] * silu(gate[i]) : gelu(inner[i]);
    return this.linear(`${name}.c_proj`, inner, T);
  }

  // LayerNorm, or RMSNorm, which has no mean and no bias; over each C numbers
  norm(name, x, C = this.config.n_embd) {
    const weight = this.weights[`${name}.weight`], bias = this.weights[`${name}.bias`], y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += C) {
      let total = 0, squares = 0;
      if (bias) for (let c = 0; c < C; c++) total += x[start + c];
      const middle = total / C;
      for (let c = 0; c < C; c++) squares += (x[start + c] - middle) ** 2;
      const size = Math.sqrt(squares / C + this.eps);
      for (let c = 0; c < C; c++) y[start + c] = ((x[start + c] - middle) / size) * weight[c] + (bias ? bias[c] : 0);
    }
    return y;
  }

  // y = W x + b at T positions: eight sums at once, of four rows of W and two positions, as each
  // number loaded then serves several. At an edge some are computed twice.
  linear(name, x, T) {
    const W = this.weights[`${name}.weight`], bias = this.weights[`${name}.bias`];
    const I = x.length / T, O = W.length / I, y = new Float32Array(T * O);
    for (let first = 0; first < O; first += 4) {
      const o = Math.max(0, Math.min(first, O - 4)), [w0, w1, w2, w3] = [o, o + 1, o + 2, o + 3].map((row) => row * I);
      for (let t = 0; t < T; t += 2) {
        const u = Math.min(t + 1, T - 1);
        let t0 = 0, t1 = 0, t2 = 0, t3 = 0, u0 = 0, u1 = 0, u2 = 0, u3 = 0;
        for (let i = 0; i < I; i++) {
          const xt = x[t * I + i], xu = x[u * I + i], a = W[w0 + i], b = W[w1 + i], c = W[w2 + i], d = W[w3 + i];
          t0 += xt * a;
          t1 += xt * b;
          t2 += xt * c;
          t3 += xt * d;
          u0 += xu * a;
          u1 += xu * b;
          u2 += xu * c;
          u3 += xu * d;
        }
        const yt = t * O + o, yu = u * O + o; // if O < 4, the next position overwrites what is too far
        y[yt] = t0;
        y[yt + 1] = t1;
        y[yt + 2] = t2;
        y[yt + 3] = t3;
        y[yu] = u0;
        y[yu + 1] = u1;
        y[yu + 2] = u2;
        y[yu + 3] = u3;
      }
    }
    if (bias) for (let i = 0; i < y.length; i++) y[i] += bias[i % O];
    return y;
  }
}

const add = (a, b, to) => to.forEach((_, i) => (to[i] = a[i] + b[i]));
const silu = (x) => x / (1 + Math.exp(-x));
const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
