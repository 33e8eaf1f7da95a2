-- fire: claims due timers. Allowed when Redis is full.
--
-- KEYS  an item: head, routes, timers, queue.
-- ARGV  retry base ms, retry max ms, retry jitter, lives of nodes that are gone ("node incarnation", NUL
--       between; '': none); then an item: member (app NUL user).
-- Reply now, then an item: {'N'} not due, or nobody of it is ·
--       {'C', claimed score, ms since it was due, due devices that were put off, then of each other: device, node,
--             incarnation, connection, attempt, its oldest unacknowledged entry if that is
--             sampled, else ''} · {'U'}: looked at again when the longest backoff has passed · {'E', text}
--
-- A device that is not behind or has no route is dropped from the timer; one that is due gets its
-- next due time, which is the claim. One whose node is gone is put off for the longest backoff here, as defer
-- would with 'V': nobody has to be asked, and a node's thousands of sessions cost one script, not two and a
-- dispatcher.

local BASE, MAX, JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local LONGEST = MAX * (1 + JITTER)
local GONE, any_gone = {}, ARGV[4] ~= ''
for life in string.gmatch(ARGV[4], '%Z+') do GONE[life] = true end

local function is_due(at)
  return at <= NOW or at > NOW + LONGEST
end

-- Decides about one device; returns 'R' if it is to be re-sent to now, 'G' if it would be and its node is gone.
local function decide(h, d, route)
  if not route or d.seq >= h.n then
    d.due, d.attempt = 0, 0
    return false
  end
  if d.due == 0 then
    d.due, d.attempt = NOW + spread(BASE, JITTER), 0
    return false
  end
  if not is_due(d.due) then return false end
  if any_gone and GONE[match(route, '^%S+ %d+')] then
    d.due, d.defers = NOW + spread(MAX, JITTER), math.min(d.defers + 1, BYTE_MAX)
    return 'G'
  end
  d.attempt = math.min(d.attempt + 1, BYTE_MAX)
  d.due = NOW + spread(math.min(BASE * 2 ^ math.min(d.attempt, 30), MAX), JITTER)
  return 'R'
end

-- The entry that a device is to acknowledge next, if its business records its trace: its last field
-- is then Envelope.traceparent, 55 bytes that end in the flags.
local function sampled_entry(h, queue, d)
  local seq = math.max(d.seq + 1, h.b)
  local body = call('LINDEX', queue, int((seq - h.b) * 2 + 1))
  if not body or not match(body, 'z7%x%x%-%x+%-%x+%-%x[13579bdf]$') then return '' end
  return string.sub(header_at(h, queue, seq), 1, HEADER_BYTES) .. body
end

local function fire(k, a)
  local head, routes, timers, member = KEYS[k], KEYS[k + 1], KEYS[k + 2], ARGV[a]
  local queue = KEYS[k + 3]
  local score = tonumber(call('ZSCORE', timers, member))
  if not score or not is_due(score) then return { 'N' } end
  local h = find_head(head)
  if not h then
    call('ZREM', timers, member)
    return { 'N' }
  end
  local late = score <= NOW and NOW - score or 0
  local reply, devices, put_off = { 'C', '0', int(late), '0' }, other_devices(h), 0
  for _, d in ipairs(devices) do
    local text = call('HGET', routes, d.name)
    local due, attempt = d.due, d.attempt
    local decision = decide(h, d, text)
    if decision == 'G' then put_off = put_off + 1 end
    if decision == 'R' then
      local route = parse_route(text)
      for _, part in ipairs({ d.name, route.node, route.incarnation, route.connection,
        int(d.attempt), sampled_entry(h, queue, d) }) do
        reply[#reply + 1] = part
      end
    end
    if d.due ~= due or d.attempt ~= attempt then save_device(h, d) end
  end
  reply[2], reply[4] = int(set_timer(timers, member, devices)), int(put_off)
  return (#reply > 4 or put_off > 0) and reply or { 'N' }
end

-- What this version must not touch would be due at each poll, in the way of the others.
local function unknown(k, a)
  call('ZADD', KEYS[k + 2], int(NOW + spread(MAX, JITTER)), ARGV[a])
end

return each(#KEYS / 4, fire, 4, 1, 5, unknown)
