// Messages of a conversation as a tree, out of the same records that are on the server's disk.

export class Dialogue {
  constructor(id) {
    this.id = id;
    this.name = "";
    this.nodes = new Map();
    this.settings = {};
    this.heads = [0, 0];
    this.below = new Map([[0, []]]);
    this.live = new Map(); // answers that are being made -> {start, tokens}
  }

  // Goes on by a record; one that is known already changes nothing.
  apply(record) {
    const node = this.nodes.get(record.id);
    switch (record.type) {
      case "dialogue":
      case "name":
        this.name = record.name;
        break;
      case "message":
        if (!node) this.add(record);
        break;
      case "text":
        if (node) {
          node.content += record.text;
          const live = this.live.get(record.id);
          if (live) live.tokens = record.tokens;
        }
        break;
      case "end":
        if (node) Object.assign(node, record, { type: "message" });
        break;
      case "train":
        if (node) node.train = record.train;
        break;
      case "head":
        this.heads[record.side || 0] = record.id;
        break;
      case "set":
        if (record.value === null) delete this.settings[record.name];
        else this.settings[record.name] = record.value;
        break;
    }
  }

  add(record) {
    const side = record.side || 0;
    this.nodes.set(record.id, { model: "", finish_reason: null, train: null, content: "", ...record });
    this.below.set(record.id, []);
    this.below.get(record.parent).push(record.id);
    this.heads[side] = record.id;
    if (this.heads[1 - side] === record.parent && record.role !== "assistant") this.heads[1 - side] = record.id;
  }

  path(side) {
    const found = [];
    for (let at = this.heads[side]; at; at = this.nodes.get(at).parent) found.push(this.nodes.get(at));
    return found.reverse();
  }

  siblings(node) {
    return this.below.get(node.parent);
  }

  // The last message of the newest branch through a message.
  leaf(id) {
    for (let below = this.below.get(id); below.length; below = this.below.get(id)) id = below[below.length - 1];
    return id;
  }

  trained(node) {
    if (node.role !== "assistant") return false;
    return node.train === null ? node.finish_reason === "stop" && node.content.trim() !== "" : node.train;
  }
}
