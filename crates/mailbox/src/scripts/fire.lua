-- fire: claims due timers. Allowed when Redis is full.
--
-- KEYS  an item: head, routes, timers, queue.
-- ARGV  retry base ms, retry max ms, retry jitter; then an item: member (app NUL user).
-- Reply now, then an item: {'N'} not due, or nobody of it is ·
--       {'C', claimed score, ms since it was due, then of each due device: device, node,
--             incarnation, connection, attempt, its oldest unacknowledged entry if that is
--             sampled, else ''} · {'U'}: looked at again when the longest backoff has passed · {'E', text}
--
-- A device that is not behind or has no route is dropped from the timer; one that is due gets its
-- next due time, which is the claim.

local BASE, MAX, JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local LONGEST = MAX * (1 + JITTER)

local function is_due(at)
  return at <= NOW or at > NOW + LONGEST
end

-- Decides about one device; returns true if it is to be re-sent to now.
local function decide(h, d, routed)
  if not routed or d.seq >= h.n then
    d.due, d.attempt = 0, 0
    return false
  end
  if d.due == 0 then
    d.due, d.attempt = NOW + spread(BASE, JITTER), 0
    return false
  end
  if not is_due(d.due) then return false end
  d.attempt = math.min(d.attempt + 1, BYTE_MAX)
  d.due = NOW + spread(math.min(BASE * 2 ^ math.min(d.attempt, 30), MAX), JITTER)
  return true
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
  local reply, devices = { 'C', '0', int(late) }, other_devices(h)
  for _, d in ipairs(devices) do
    local text = call('HGET', routes, d.name)
    local due, attempt = d.due, d.attempt
    if decide(h, d, text) then
      local route = parse_route(text)
      for _, part in ipairs({ d.name, route.node, route.incarnation, route.connection,
        int(d.attempt), sampled_entry(h, queue, d) }) do
        reply[#reply + 1] = part
      end
    end
    if d.due ~= due or d.attempt ~= attempt then save_device(h, d) end
  end
  reply[2] = int(set_timer(timers, member, devices))
  return #reply > 3 and reply or { 'N' }
end

-- What this version must not touch would be due at each poll, in the way of the others.
local function unknown(k, a)
  call('ZADD', KEYS[k + 2], int(NOW + spread(MAX, JITTER)), ARGV[a])
end

return each(#KEYS / 4, fire, 4, 1, 4, unknown)
