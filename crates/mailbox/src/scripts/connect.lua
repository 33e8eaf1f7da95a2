-- connect: a device said Hello. Allowed when Redis is full.
--
-- KEYS  an item: head, queue, routes, timers.
-- ARGV  ttl ms, retry base ms, retry jitter, devices_max, fence ms; then an item: member
--       (app NUL user), device, node, incarnation, connection, attempt, platform, deadline ms of
--       Redis's time (0: none), epoch candidate, 1 if it says where it stands else 0, and there:
--       epoch, generation, seq, chain or ''.
-- Reply now, then an item:
--       {'C', epoch, generation, seq, chain, newest, 1 if it was reset, and of the session that it
--             replaced: node or '', incarnation, connection; 1 if what follows was evicted}
--       {'S', attempt} this newer attempt is or was there · {'M'} too many devices, all online
--       {'L'} past its deadline · {'U'} · {'E', text}
--
-- The fence holds while the route stands and for `fence ms` after: a call cannot arrive later than
-- that (its deadline), and a device whose clock went back must not be locked out for ever.

local TTL, BASE, JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local DEVICES_MAX, FENCE = tonumber(ARGV[4]), tonumber(ARGV[5])

-- Where a device new to this user starts: the furthest cursor of the others, else the oldest entry. While the
-- mailbox keeps all it starts at the oldest entry, because Redis may have forgotten it.
local function start(h, queue, name, others)
  local seq = h.b - 1
  for i, other in ipairs(keeps_all(h) and {} or others) do
    if i == 1 or other.seq > seq then seq = math.max(other.seq, h.b - 1) end
  end
  local d = new_device(h, name, 0)
  d.seq, d.chain = seq, chain_at(h, queue, seq) or h.bc
  return d
end

-- Moves `d` to where the device says it stands. Returns the seq and chain from which it reads (below
-- the oldest entry: what lies between was evicted, and it is told), and whether it was reset.
local function resume(h, queue, d, known, a)
  local epoch, generation = tonumber(ARGV[a]), claimed(d, tonumber(ARGV[a + 1]))
  local seq, chain = tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  if epoch ~= h.e or seq > h.n then
    reset_device(h, d, generation, not known and epoch ~= h.e)
    return d.seq, d.chain, true
  end
  if seq < h.b - 1 then
    d.seq, d.chain, d.generation = h.b - 1, h.bc, math.max(d.generation, generation)
    return seq, chain or 0, false
  end
  local ours = chain_at(h, queue, seq)
  if chain and chain ~= ours then
    reset_device(h, d, generation)
    return d.seq, d.chain, true
  end
  if not chain and known and generation < d.generation then
    return d.seq, d.chain, true -- it has not heard yet of its reset
  end
  d.seq, d.chain, d.generation = seq, ours, math.max(d.generation, generation)
  return seq, ours, false
end

local function connect(k, a)
  local head, queue, routes, timers = KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3]
  local member, name, attempt = ARGV[a], ARGV[a + 1], tonumber(ARGV[a + 5])
  local deadline = tonumber(ARGV[a + 7])
  if deadline > 0 and NOW > deadline then return { 'L' } end
  local text = call('HGET', routes, name)
  local old = text and parse_route(text)
  if old and old.attempt > attempt then return { 'S', old.attempt } end
  local h = find_head(head) or new_head(head, ARGV[a + 8])
  local d = find_device(h, name)
  local others, known = other_devices(h, d and name), d ~= nil and d ~= false
  open(h, queue, TTL)
  if d and not old and d.fence > attempt and NOW - d.used < FENCE then return { 'S', d.fence } end

  if not known then
    d = start(h, queue, name, others)
    if not add_device(h, routes, d, others, DEVICES_MAX) then return { 'M' } end
  end
  local seq, chain, reset
  if ARGV[a + 9] == '1' then
    seq, chain, reset = resume(h, queue, d, known, a + 10)
  else
    if d.seq > h.n then
      reset_device(h, d, 0)
      reset = true
    end
    seq, chain = d.seq, d.chain
  end

  if keeps_all(h) then trim_to_lowest(h, queue, d, others) end
  d.used, d.fence, d.attempt, d.defers = NOW, attempt, 0, 0
  d.due = d.seq < h.n and NOW + spread(BASE, JITTER) or 0
  save(h, d)
  set_route(routes, name, table.concat({ ARGV[a + 2], ARGV[a + 3], ARGV[a + 4],
    ARGV[a + 5], ARGV[a + 6] }, ' '), TTL)
  others[#others + 1] = d
  set_timer(timers, member, others)
  local replaced = old and not (old.node == ARGV[a + 2] and old.incarnation == ARGV[a + 3]
    and old.connection == ARGV[a + 4]) and old
  return { 'C', h.e, d.generation, seq, chain, h.n, reset and 1 or 0,
    replaced and old.node or '', replaced and old.incarnation or '0',
    replaced and old.connection or '0', d.seq > seq and 1 or 0 }
end

return each(#KEYS / 4, connect, 4, 14, 6)
