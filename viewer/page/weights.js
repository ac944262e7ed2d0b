// The weights of the model, as weights.py packed them.

// Name -> its numbers, row by row
function unpackWeights({ form, tensors, data }) {
  const decode = { f32: (bytes) => new Float32Array(bytes.buffer), f16: halves, int8: rowsOfInt8 }[form];
  const numbers = decode(bytesOf(data), tensors);
  let from = 0;
  const next = ([name, shape]) => [name, numbers.subarray(from, from += shape.reduce((a, b) => a * b))];
  return Object.fromEntries(tensors.map(next));
}

// Half precision: a sign, 5 bits of exponent, 10 bits of fraction. There are few enough for a table
function halves(bytes) {
  const table = Float32Array.from({ length: 65536 }, (_, bits) => {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const size = exponent === 31 ? (fraction ? NaN : Infinity)
      : exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
    return bits >> 15 ? -size : size;
  });
  const all = new Uint16Array(bytes.buffer), numbers = new Float32Array(all.length);
  for (let i = 0; i < all.length; i++) numbers[i] = table[all[i]];
  return numbers;
}

// First float32, one for each row of a matrix and each number of a vector; then the matrices as int8
function rowsOfInt8(bytes, tensors) {
  const n = sum(tensors.map(([, shape]) => shape[0]));
  const floats = new Float32Array(bytes.buffer, 0, n), cells = new Int8Array(bytes.buffer, 4 * n);
  const numbers = new Float32Array(sum(tensors.map(([, [rows, columns = 1]]) => rows * columns)));
  let row = 0, cell = 0, at = 0;
  for (const [, [rows, columns]] of tensors) for (const end = row + rows; row < end; row++) {
    if (columns === undefined) numbers[at++] = floats[row];
    else for (let i = 0; i < columns; i++) numbers[at++] = floats[row] * cells[cell++];
  }
  return numbers;
}
