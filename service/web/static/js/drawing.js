// Where the operators of a block stand: columns by depth, lanes by branch.

/**
 * @typedef {{op: string, module: string, kernel: number[], groups: number, reads: number[]}} Operation
 *   As the report has it; `reads` are positions, -1 is what enters the block.
 * @typedef {{kind: string, label: string, module: string, reads: number[], column: number, lane: number}} Placed
 * @typedef {{nodes: Placed[], columns: number, lanes: number, entry: number}} Drawing
 *   `lanes` may be fractions: a join stands between its branches. `entry` is the lane of the input.
 */

/**
 * @param {Operation[]} operations
 * @returns {Drawing}
 */
export function placed(operations) {
  const steps = withPassing(withSums(withBorders(operations.map(named))));
  const readers = new Map();
  steps.forEach((step, at) =>
    step.reads.forEach((read) => readers.set(read, [...(readers.get(read) ?? []), at])),
  );
  let lanes = 0;
  /** @type {Placed[]} */
  const nodes = [];
  for (const [at, step] of steps.entries()) {
    const column =
      1 + Math.max(0, ...step.reads.map((read) => (read < 0 ? 0 : nodes[read].column)));
    const joins = step.reads.length > 1;
    const only = step.reads[0];
    const continues = !joins && only >= 0 && readers.get(only)[0] === at;
    const lane = joins
      ? mean(step.reads.map((read) => nodes[read].lane))
      : continues
        ? nodes[only].lane
        : lanes++;
    nodes.push({ ...step, column, lane });
  }
  const starts = nodes.filter((node) => node.reads.includes(-1)).map((node) => node.lane);
  return {
    nodes,
    columns: Math.max(1, ...nodes.map((node) => node.column)),
    lanes: Math.max(1, lanes),
    entry: starts.length > 0 ? mean(starts) : 0,
  };
}

/** @param {number[]} values */
function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** @type {Record<string, [string, string]>} ATen name to kind and label. */
const NAMES = {
  batch_norm: ["norm", "BN"],
  add: ["join", "+"],
  sub: ["join", "−"],
  mul: ["scale", "×"],
  div: ["scale", "÷"],
  cat: ["join", "cat"],
  pad: ["pad", "pad"],
  constant_pad_nd: ["pad", "pad"],
  slice: ["pad", "slice"],
  linear: ["conv", "linear"],
};

/** @param {Operation} operation */
function named(operation) {
  const name = operation.op.replace(/^aten\./, "").split(".")[0];
  if (operation.kernel.length > 0) {
    const groups = operation.groups > 1 ? ` g${operation.groups}` : "";
    return { ...operation, kind: "conv", label: `${operation.kernel.join("×")}${groups}` };
  }
  const [kind, label] =
    NAMES[name] ??
    (/^(avg|adaptive_avg)_pool/.test(name) ? ["pool", "avg"] : ["other", name.replace(/_/g, " ")]);
  const alone = kind === "join" && operation.reads.length < 2; // of a constant: a shift
  return { ...operation, kind: alone ? "scale" : kind, label: alone ? "shift" : label };
}

/**
 * `subtract, pad, add` of one module is a border filled with a bias, one step to people.
 * @param {ReturnType<typeof named>[]} steps
 */
function withBorders(steps) {
  return merged(steps, (step, at, all) => {
    const pad = all[step.reads[0]];
    const before = pad === undefined ? undefined : all[pad.reads[0]];
    const isBorder =
      step.label === "shift" &&
      pad?.kind === "pad" &&
      before?.label === "shift" &&
      step.module === before.module;
    return isBorder
      ? {
          into: { ...step, kind: "pad", label: "border", reads: before.reads },
          gone: [step.reads[0], pad.reads[0]],
        }
      : null;
  });
}

/**
 * A sum that only a sum reads is part of it.
 * @param {ReturnType<typeof named>[]} steps
 */
function withSums(steps) {
  const readers = steps.map((_, at) => steps.filter((step) => step.reads.includes(at)).length);
  return merged(steps, (step, at, all) => {
    if (step.label !== "+") return null;
    const inner = step.reads.filter(
      (read) => read >= 0 && all[read].label === "+" && readers[read] === 1,
    );
    if (inner.length === 0) return null;
    return {
      into: {
        ...step,
        reads: step.reads.flatMap((read) => (inner.includes(read) ? all[read].reads : [read])),
      },
      gone: inner,
    };
  });
}

/**
 * Where a join reads its own operand's source directly (an identity branch), a step in a lane of its own.
 * @param {ReturnType<typeof named>[]} steps
 */
function withPassing(steps) {
  const passing = steps.flatMap((step, at) =>
    step.reads.length > 1
      ? step.reads
          .filter((read) => read < 0 || readBefore(steps, read, at))
          .map((read) => ({ at, read }))
      : [],
  );
  /** @type {ReturnType<typeof named>[]} */
  const result = [];
  const moved = new Map([[-1, -1]]);
  steps.forEach((step, at) => {
    const own = passing.filter((each) => each.at === at);
    const places = new Map();
    for (const { read } of own) {
      result.push({
        op: "",
        module: step.module,
        kernel: [],
        groups: 1,
        kind: "pass",
        label: "identity",
        reads: [moved.get(read) ?? -1],
      });
      places.set(read, result.length - 1);
    }
    result.push({
      ...step,
      reads: step.reads.map((read) => places.get(read) ?? moved.get(read) ?? -1),
    });
    moved.set(at, result.length - 1);
  });
  return result;
}

/** Whether a step before `at` reads `read` too. @param {{reads: number[]}[]} steps @param {number} read @param {number} at */
function readBefore(steps, read, at) {
  return steps.some((step, position) => position < at && step.reads.includes(read));
}

/**
 * Replace steps by what `change` says and drop those that are gone, keeping `reads` right.
 * @template {{reads: number[]}} T
 * @param {T[]} steps
 * @param {(step: T, at: number, all: T[]) => {into: T, gone: number[]} | null} change
 * @returns {T[]}
 */
function merged(steps, change) {
  const all = [...steps];
  const gone = new Set();
  all.forEach((step, at) => {
    const answer = change(step, at, all);
    if (answer === null) return;
    all[at] = answer.into;
    answer.gone.forEach((each) => gone.add(each));
  });
  const places = new Map([[-1, -1]]);
  const kept = all.filter((_, at) => !gone.has(at) && places.set(at, places.size - 1));
  return kept.map((step) => ({ ...step, reads: step.reads.map((read) => places.get(read) ?? -1) }));
}
