-- ack: a device has everything up to a position. Allowed when Redis is full: it is what frees it.
--
-- KEYS  an item: head, queue, routes; behind the items the timers of their shards.
-- ARGV  ttl ms, retry base ms, retry jitter, devices_max, epoch candidate; then an item:
--       member (app NUL user), d:<device>, and, packed (ITEM), which of the timers is its shard's (from
--       1) and what it acknowledges: epoch, seq, generation, chain; behind that the session: "node
--       incarnation connection ".
-- Reply now, then an item: the cursor · {'R', epoch, generation, seq, chain} the history forked
--       or the epoch is another: start over from there · {'S'} sent under an older generation ·
--       {'U'} · {'E', text}

local TTL, BASE, JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local DEVICES_MAX, CANDIDATE = tonumber(ARGV[4]), ARGV[5]
local ITEM, COUNT = '<HddII', (#ARGV - 5) / 3

-- Whether a reset, or an ack of a device that was not known, begins the retries: the device has a route, and
-- they are not another session's that are under way.
local function may_begin(routes, name, session, due)
  local text = call('HGET', routes, name)
  return text and (due == 0 or string.sub(text, 1, #session) == session)
end

-- An ack of whatever kind; `v` is the head's state and the device.
local function decide(k, a, v)
  local head, queue, routes = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local field = ARGV[a + 1]
  local name = string.sub(field, 3)
  local timers, epoch, seq, generation, chain, session_at = parse(ITEM, ARGV[a + 2])
  local h = v[1] and parse_head(head, v[1]) or new_head(head, CANDIDATE)
  local d = v[1] and v[2] and parse_device(name, v[2])
  local others = other_devices(h, d and name)
  open(h, queue, TTL)
  if d and d.generation > generation then return { 'S' } end
  local is_known = d
  if not is_known then
    d = new_device(h, name, generation)
    if not add_device(h, routes, d, others, DEVICES_MAX) then return seq end
  end

  local ours = chain_at(h, queue, seq)
  local reset = epoch ~= h.e or seq > h.n or (ours and ours ~= chain)
  local progress = false
  if reset then
    reset_device(h, d, generation, not is_known and epoch ~= h.e)
  else
    d.generation = claimed(d, generation)
    if ours and seq > d.seq then
      d.seq, d.chain, progress = seq, ours, true
    end
  end
  d.used = NOW
  local due = d.due
  if d.seq >= h.n then
    d.due, d.attempt, d.defers = 0, 0, 0
  elseif progress and due > 0 -- it is behind and has a route
    or (reset or not is_known) and may_begin(routes, name, string.sub(ARGV[a + 2], session_at), due) then
    d.due, d.attempt, d.defers = NOW + spread(BASE, JITTER), 0, 0
  end
  if progress or keeps_all(h) then trim_to_lowest(h, queue, d, others) end
  call('HSET', head, 's', head_state(h), field, device_state(d))
  if d.due ~= due then
    others[#others + 1] = d
    set_timer(KEYS[COUNT * 3 + timers], ARGV[a], others)
  end
  if reset then return { 'R', h.e, d.generation, d.seq, d.chain } end
  return d.seq
end

-- The usual ack, without a table: a user's only device, which has what it was sent, acknowledges some
-- more. Does what `decide` would; everything else is left to it.
local function ack(k, a)
  local head, queue, field = KEYS[k], KEYS[k + 1], ARGV[a + 1]
  local timers, epoch, seq, generation, chain = parse(ITEM, ARGV[a + 2])
  local v = call('HMGET', head, 's', field)
  local state, device = v[1], v[2]
  if not (state and device and #state == STATE_BYTES and #device == DEVICE_BYTES) then
    return decide(k, a, v)
  end
  local plain, e, b, bc, n, nc, x, ct, kl, dc, bt, nt = parse(STATE, state)
  local mark, before, _, sent_under, due, attempt, _, fence = parse(DEVICE, device)
  if plain ~= VERSION or mark ~= VERSION or dc ~= 1 or kl ~= 0 or e ~= epoch
    or sent_under ~= generation or seq <= before or seq < b or seq > n or x - NOW < TTL then
    return decide(k, a, v)
  end
  if seq == n then
    if chain ~= nc then return decide(k, a, v) end
    call('DEL', queue)
    bt = nt
    if due > 0 then call('ZREM', KEYS[COUNT * 3 + timers], ARGV[a]) end
    due, attempt = 0, 0
  else
    local last = (seq - b) * 2
    local ours, bytes = header_place(call('LINDEX', queue, int(last)))
    if chain ~= ours then return decide(k, a, v) end
    bt = bytes
    call('LTRIM', queue, int(last + 2), '-1')
    if due > 0 then
      due, attempt = NOW + spread(BASE, JITTER), 0
      call('ZADD', KEYS[COUNT * 3 + timers], int(due), ARGV[a])
    end
  end
  call('HSET', head, 's', pack(STATE, VERSION, e, seq + 1, chain, n, nc, x, ct, kl, dc, bt, nt),
    field, pack(DEVICE, VERSION, seq, chain, generation, due, attempt, NOW, fence, 0))
  return seq
end

return each(COUNT, ack, 3, 3, 6)
