-- confirm: a session is alive. Restores what a failover or an expiry removed. Allowed when Redis is full.
--
-- KEYS  an item: head, queue, routes, timers.
-- ARGV  ttl ms, retry base ms, retry jitter, devices_max; then an item: member (app NUL user), device, node,
--       incarnation, connection, attempt, platform, epoch candidate, and the last position that the session
--       acknowledged: epoch, generation, seq, chain or ''.
-- Reply now, then an item:
--       {'C', 1 if the route was absent else 0, epoch, newest}  confirmed
--       {'S'}  superseded: a newer session of the device is connected, or was
--       {'U'}, {'E', text}
--
-- A route of the same node, connection and attempt under an older incarnation is this session's: its node's
-- lease had lapsed.

TTL, RETRY_BASE, RETRY_JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local DEVICES_MAX = tonumber(ARGV[4])
local CONFIRMED, SUPERSEDED = 'C', 'S'

-- The device as the session knows it, where the head has lost it; the session's position begins at `position_at`. The
-- device keeps its position even if the next entries were trimmed, and one from another life of the mailbox
-- starts at 0: in both cases the node tells the device that entries are gone.
local function restored_device(mailbox, name, position_at)
  local device = new_device(mailbox, name, tonumber(ARGV[position_at + 1]))
  local seq, chain = tonumber(ARGV[position_at + 2]), tonumber(ARGV[position_at + 3])
  if tonumber(ARGV[position_at]) ~= mailbox.epoch then
    device.seq, device.chain = 0, 0
    return device
  end
  local stored_chain = chain_at(mailbox, seq)
  if stored_chain and (not chain or chain == stored_chain) then
    device.seq, device.chain = seq, stored_chain
  elseif seq < mailbox.oldest then
    device.seq, device.chain = min(seq, mailbox.oldest - 1),
      seq == mailbox.oldest - 1 and mailbox.chain_before_oldest or chain or 0
  end
  return device
end

local function confirm(key_at, arg_at)
  local head, queue, routes, timers =
    KEYS[key_at], KEYS[key_at + 1], KEYS[key_at + 2], KEYS[key_at + 3]
  local member, name, node = ARGV[arg_at], ARGV[arg_at + 1], ARGV[arg_at + 2]
  local connection, attempt = ARGV[arg_at + 4], tonumber(ARGV[arg_at + 5])
  local stored_route, tail = call('HGET', routes, name), ''
  if stored_route then
    local route = parse_route(stored_route)
    local is_own = route.node == node and route.connection == connection and route.attempt == attempt
    if not is_own and route.attempt >= attempt then return { SUPERSEDED } end
    if is_own then tail = route.tail end
  end
  local mailbox = find_mailbox(head, queue) or new_mailbox(head, queue, ARGV[arg_at + 7])
  local device = find_device(mailbox, name)
  local others, is_known = other_devices(mailbox, device and name), true
  open(mailbox)
  if device and not stored_route and device.last_attempt > attempt then return { SUPERSEDED } end
  if not device then
    device = restored_device(mailbox, name, arg_at + 8)
    is_known = add_device(mailbox, routes, device, others, DEVICES_MAX)
  end
  if is_known then
    if device.seq >= mailbox.newest then
      disarm_device(device)
    elseif device.due_at == 0 then
      arm_device(device)
    elseif device.defers > 0 then -- its node could not be reached
      device.due_at = min(device.due_at, NOW + spread(RETRY_BASE))
    end
    device.used_at, device.last_attempt, device.defers = NOW, attempt, 0
    if keeps_all(mailbox) then trim_acknowledged(mailbox, device, others) end
    save(mailbox, device)
    others[#others + 1] = device
  end
  local route = table.concat({ node, ARGV[arg_at + 3], connection, ARGV[arg_at + 5],
    ARGV[arg_at + 6] }, ' ') .. tail
  set_route(routes, name, stored_route ~= route and route)
  set_timer(timers, member, others)
  return { CONFIRMED, stored_route and 0 or 1, mailbox.epoch, mailbox.newest }
end

return each(#KEYS / 4, confirm, 4, 12, 5)
